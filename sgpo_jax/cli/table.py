"""The commands and their flags, as one table that imports none of them."""

import os
import sys

import sgpo_jax
from sgpo_jax.cli import entry
from sgpo_jax.cli.command import Command, Flag
from sgpo_jax.cli.help import overview
from sgpo_jax.config import nearest

_WORKDIR = Flag("workdir", "Folder of the run.", required=True)
_PUSH = (
    Flag("push", "Repository of the Hugging Face hub that gets it too, OWNER/NAME; created, private, if it is new.",
         default=""),
    Flag("public", "With --push: anyone may read the repository.", bool, False),
)  # fmt: skip
_BEFORE = "sgpo_jax.commands."

COMMANDS = {
    "train": Command(
        "trains a model: warm-up, RL and evaluation. The same command resumes a run that was stopped.",
        _BEFORE + "train:main",
        (
            Flag("workdir", "Folder for checkpoints, metrics and generations, also at gs://, s3:// or hf://OWNER/NAME; "
                 "resumes if it can.", required=True),
        ),
        fields=("",),
        examples=(
            "sgpo train --config=configs/quickstart.py --workdir=/tmp/quickstart",
            "sgpo train --config=configs/quickstart.py:grpo --workdir=/tmp/grpo --config.rl.batch=16",
            "sgpo train --config=configs/smollm2_135m.py --workdir=runs/mine --config.data.train=train.jsonl "
            "--config.eval.sets.heldout.source=test.jsonl",
        ),
        processes=True,
    ),
    "evaluate": Command(
        "measures avg@k, pass@k and maj@k of a run, a folder or a hub model on sets of problems.",
        _BEFORE + "evaluate:main",
        (
            Flag("checkpoint", "Folder of a run, with :best (the default), :last or :STEP."),
            Flag("model", "Hugging Face folder or hub id, .gguf file, or 'smollm2'."),
            Flag("out", "Folder for generations and results; resumes if it can. Default: evaluate in the run."),
            Flag("paper", "The paper's row to print beside, MODEL:METHOD, such as qwen7b:sgpo.", default=""),
            Flag("limit", "First problems of each set that are evaluated; 0 is all.", int, 0, low=0),
        ),
        config="any",
        folder="checkpoint",
        fields=("eval.", "data.instruction", "data.system", "mesh."),
        examples=(
            "sgpo evaluate --checkpoint=/tmp/quickstart",
            "sgpo evaluate --checkpoint=/tmp/quickstart:last --config.eval.sets.more.source=test.jsonl",
            "sgpo evaluate --model=Qwen/Qwen2.5-0.5B-Instruct --out=results "
            "--config.eval.sets.mine.source=test.jsonl --config.eval.sets.mine.samples=4",
        ),
        processes=True,
    ),
    "export": Command(
        "writes the trained model as a Hugging Face folder, which transformers and vLLM load.",
        _BEFORE + "export:main",
        (
            _WORKDIR,
            Flag("to", "Folder to create.", required=True),
            Flag("stage", "Whose best checkpoint is exported.", default="rl", choices=("sft", "rl")),
            Flag("dtype", "Of the exported weights.", default="bfloat16", choices=("float32", "bfloat16")),
            Flag("adapters", "Write only the adapters (config.lora), in float32, as a folder of peft.", bool, False),
            *_PUSH,
        ),
        config="run",
        examples=(
            "sgpo export --workdir=/tmp/quickstart --to=/tmp/model",
            "sgpo export --workdir=runs/mine --to=/tmp/model --push=me/my-model",
        ),
        processes=True,
    ),
    "generate": Command(
        "asks a run, a folder or a hub model: one question, or a file of them.",
        _BEFORE + "generate:main",
        (
            Flag("workdir", "Folder of a run, with :best (the default), :last or :STEP."),
            Flag("model", "Hugging Face folder or hub id, .gguf file, or 'smollm2'."),
            Flag("file", "JSONL file of questions: 'problem'; also 'id', 'strategy' and 'answer' where it has them."),
            Flag("strategy", "Strategy that is shown before the question.", default=""),
            Flag("guided", "With --file: show the strategies of its lines.", bool, False),
            Flag("samples", "Responses to each question.", int, 1, low=1),
            Flag("seed", "Of the sampling. A response depends on seed, question and sample alone.", int, 0, low=0),
            Flag("temperature", "0 takes the likeliest token. Default: eval.temperature.", float, low=0),
            Flag("max_new_tokens", "Tokens; a longer response is cut. Default: eval.max_new_tokens.", int, low=1),
            Flag("to", "JSONL file for the responses."),
            Flag("show_prompt", "Print the prompts as the model sees them.", bool, False),
        ),
        config="any",
        fields=("eval.temperature", "eval.top", "eval.max", "eval.slots", "eval.batch", "data.instruction",
                "data.system", "model.", "mesh."),
        examples=(
            "sgpo generate --workdir=/tmp/quickstart 'Prices at copper market: 1 8, 4 6, 6 9'",
            "sgpo generate --model=smollm2 --samples=3 --temperature=0.7 --max_new_tokens=100 'What is 12 + 30?'",
            "sgpo generate --workdir=runs/mine --file=test.jsonl --guided --to=answers.jsonl",
        ),
        arguments="questions",
        announced=False,
    ),
    "plan": Command(
        "compiles a run for TPUs or GPUs that need not be there: memory, work, communication, time and cost.",
        _BEFORE + "plan:main",
        (
            Flag("topology", "Chips to plan for, as in v5e:16x16, h100:8 or h100:4x8; auto searches.", required=True),
            Flag("chips", "With --topology=auto: the chips to search a mesh for, as in v5e:16x16.", default=""),
            Flag("json", "File that the plan is written to as JSON.", default=""),
            Flag("response_tokens", "Mean length of responses; 0 is a quarter of rl.max_new_tokens.", int, 0),
            Flag("lengths", "Folder of a run; the lengths of its responses in place of --response_tokens.", default=""),
            Flag("prompt_tokens", "Length of prompts; 0 is a quarter of data.max_prompt_tokens.", int, 0),
            Flag("correct", "Share of the responses that are correct.", float, 0.5, low=0.0, high=1.0),
            Flag("acceptance", "Probability that a drafted token is right where those before it are.", float, 0.25,
                 low=0.0, high=1.0),
            Flag("problems", "Rows of the training data.", int, 8500, low=1),
            Flag("eval_problems", "Problems of an evaluation set that is not in the paper.", int, 500, low=1),
            Flag("flops_share", "Share of the peak FLOP/s that is reached.", float, low=0.01, high=1.0),
            Flag("hbm_share", "Share of the peak HBM bandwidth that is reached.", float, low=0.01, high=1.0),
            Flag("ici_share", "Share of the peak bandwidth between chips that is reached.", float,
                 low=0.01, high=1.0),
            Flag("network_share", "Share of the peak bandwidth between hosts that is reached.", float,
                 low=0.01, high=1.0),
            Flag("memory_share", "Share of a GPU's memory that JAX takes, XLA_PYTHON_CLIENT_MEM_FRACTION of the run.",
                 float, low=0.01, high=1.0),
            Flag("price", "Dollars for a chip and hour; 0 takes the price that docs/plan.md states.", float, 0.0,
                 low=0.0),
        ),
        examples=(
            "sgpo plan --config=configs/qwen7b.py --topology=v5e:16x16",
            "sgpo plan --config=configs/qwen7b.py:h100x32 --topology=h100:4x8",
            "sgpo plan --config=configs/qwen7b.py --topology=auto --chips=v5e:16x16 --json=plan.json",
        ),
        announced=False,
    ),
    "lab": Command(
        "compares methods over seeds and worlds, with a verdict on each of the paper's claims.",
        _BEFORE + "lab:main",
        (
            Flag("workdir", "Folder of the results; a lab that was stopped resumes there.", required=True),
            Flag("fast", "Run the small lab, with the changes of config.lab.fast.", bool, False),
        ),
        fields=("lab.",),
        examples=("sgpo lab --config=configs/lab.py --workdir=/tmp/lab --fast",),
    ),
    "report": Command(
        "writes the page of a run or a lab, or one page that compares several runs.",
        _BEFORE + "report:main",
        (
            Flag("workdir", "Folder of a run or of a lab."),
            Flag("to", "File to write; report.html in the folder by default."),
        ),
        config="",
        examples=("sgpo report --workdir=/tmp/quickstart", "sgpo report runs/sgpo runs/grpo --to=compared.html"),
        arguments="runs",
        announced=False,
    ),
    "strategies": Command(
        "extracts strategies from expert responses by a strong model, and rates them.",
        _BEFORE + "strategies:main",
        (
            Flag("workdir", "Folder of the journal; an extraction there is resumed.", required=True),
            Flag("to", "JSONL file for the problems with strategies; WORKDIR/strategies.jsonl by default.", default=""),
            Flag("audit", "Rate a sample of the kept strategies instead.", bool, False),
            *_PUSH,
        ),
        fields=("seed", "extract."),
        examples=(
            "sgpo strategies --config=configs/strategies.py --workdir=runs/strategies "
            "--config.extract.source=problems.jsonl",
        ),
        announced=False,
    ),
    "analyze": Command(
        "shows where a strategy changes the model: the KL between both contexts, by token and by step.",
        _BEFORE + "analyze:main",
        (
            _WORKDIR,
            Flag("problems", "Problems whose guided responses are analysed.", int, 8, low=1),
        ),
        config="run",
        processes=True,
        examples=("sgpo analyze --workdir=/tmp/quickstart --problems=8",),
    ),
    "replay": Command(
        "repeats an update that a run skipped, and finds the first number that is not finite.",
        _BEFORE + "replay:main",
        (
            _WORKDIR,
            Flag("batch", "A skipped_batch_STEP.npz of the run.", required=True),
            Flag("step", "Take the state after this step; by default the last one before the batch.", int),
        ),
        config="run",
        examples=("sgpo replay --workdir=runs/mine --batch=runs/mine/rl/skipped_batch_17.npz",),
    ),
}  # fmt: skip


def main() -> None:
    """Runs `sgpo COMMAND ...`."""
    if os.getcwd() not in sys.path:  # as with `python -m`: configs and rewards of the user's own lie there
        sys.path.insert(0, os.getcwd())
    name, *arguments = sys.argv[1:] or ["--help"]
    with entry.readable():
        if name in ("--version", "version"):
            print(f"sgpo_jax {sgpo_jax.__version__}")
        elif name in ("--help", "-h", "help"):
            print(overview(COMMANDS, sgpo_jax.__version__), end="")
        elif name in COMMANDS:
            entry.start(name, COMMANDS[name], arguments)
        else:
            sys.exit(f"sgpo_jax: {name}: is not a command{nearest(name, COMMANDS)}; allowed: {', '.join(COMMANDS)}")
