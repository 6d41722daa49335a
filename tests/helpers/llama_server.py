"""Runs llama.cpp's server with one model until it is killed, and prints its address once it listens.

    python llama_server.py MODEL.gguf KEY
"""

import sys
import threading

import xllamacpp


def main(model: str, key: str) -> None:
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.port = 0  # any free one
    params.api_keys = [key]
    params.n_parallel = 2
    params.n_ctx = 2 * 1024  # for both together
    # On a busy machine several threads wait for each other most of the time.
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.warmup = False
    server = xllamacpp.Server(params)
    print(f"listening on {server.listening_address}", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
