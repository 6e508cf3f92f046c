"""The process of an SGLang server, run as a module: it reads SGLang's arguments as one line of JSON from stdin.

Stdin stays open; when it closes, the process that started the server has ended, and so does the server.
"""

import dataclasses
import json
import os
import signal
import sys
import threading

# The names of one argument in different versions of SGLang, the newest first.
CUDA_GRAPH_BATCH_SIZES = ("cuda_graph_bs_decode", "cuda_graph_bs")


def main() -> None:
    """Run the server in this process."""
    arguments = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_the_trainer, daemon=True).start()
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.server_args import ServerArgs

    known = {field.name for field in dataclasses.fields(ServerArgs)}
    newest, *older = CUDA_GRAPH_BATCH_SIZES
    if newest not in known and newest in arguments:
        arguments[next(name for name in older if name in known)] = arguments.pop(newest)
    if unknown := sorted(set(arguments) - known):
        sys.exit(f"error: engine.server_arguments: this version of SGLang has no {', '.join(unknown)}: remove them")
    launch_server(ServerArgs(**arguments))


def _end_with_the_trainer() -> None:
    sys.stdin.read()
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
