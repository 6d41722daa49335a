"""Strategy-guided policy optimization (SGPO, arXiv 2606.24064) of language models in JAX."""

import os

# transformers would tell every user that torch is missing; only its tokenizers are used here.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
