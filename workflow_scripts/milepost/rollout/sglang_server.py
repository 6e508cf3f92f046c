"""One SGLang server: its process, which listens on the loopback interface, and the HTTP calls to it."""

import base64
import contextlib
import http.client
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from milepost.common import loopback
from milepost.common.errors import UserError
from milepost.configuration.schema import Engine
from milepost.rollout import sglang_launch
from milepost.rollout.engine import Completion, Drafting, Request, SamplingParams

HOST = "127.0.0.1"
START_SECONDS = 1800  # a cold start compiles kernels
KINDS_OF_MEMORY = ("kv_cache", "weights", "cuda_graph")
SCRIPTS = Path(__file__).parents[2]

# A launcher such as torchrun sets these for its own processes, not for SGLang's.
NOT_INHERITED = re.compile(
    r"(RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|GROUP_.*|ROLE_.*|MASTER_.*|TORCHELASTIC_.*|MILEPOST_.*)"
)
# Error messages of SGLang processes that another one's failure caused.
CONSEQUENCE = re.compile(r"EOFError|scheduler died|Initialization failed|error messages above", re.IGNORECASE)


class ServerDown(Exception):
    """The server's process has ended or no longer answers."""


class Server:
    """A server that can be started, queried, killed and restarted.

    Attributes:
        name: for messages.
        starts: how often it was started, so that late errors of an earlier process can be recognized.
        has_answered: whether it has answered a request since its last start; until then it may be compiling kernels.
        holds_weights: whether it has the current weights.
        log: the output of all its starts; the previous run's log is kept next to it.
    """

    def __init__(self, folder: Path, settings: Engine, index: int, logs: Path):
        self.index, self.name = index, f"SGLang server {index}"
        self.starts, self.has_answered, self.holds_weights = 0, False, False
        self._arguments = server_arguments(folder, settings, index)
        self._key = secrets.token_hex()
        self._process: subprocess.Popen | None = None
        self._port = 0
        self._private: tempfile.TemporaryDirectory | None = None
        self.log = logs / f"sglang-{index}.log"

    @property
    def alive(self) -> bool:
        """Whether its process is running; it may still not answer."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the process and wait until it answers; a `UserError` gives the reason if it does not."""
        if not self.starts:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            if self.log.exists():
                self.log.replace(self.log.with_suffix(".previous.log"))
        self.starts += 1
        self.has_answered = False
        self._port = _free_port()
        arguments = self._arguments | {"port": self._port, "api_key": self._key}
        # New for every start: the next process can't use a killed one's store, which may even still be in use.
        self._private = tempfile.TemporaryDirectory(prefix="milepost-sglang-", ignore_cleanup_errors=True)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", sglang_launch.__name__],
                stdin=subprocess.PIPE,  # stays open; the server ends when it closes
                bufsize=0,
                stdout=log,
                stderr=log,
                env=self._environment(),
                start_new_session=True,  # Ctrl-C is for the trainer to handle
            )
        with contextlib.suppress(BrokenPipeError):  # the process has ended; its log says why
            self._process.stdin.write(json.dumps(arguments).encode() + b"\n")
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if not self.alive or time.monotonic() > deadline:
                why = _reason(self.log) if not self.alive else f"no answer within {START_SECONDS} s"
                self.kill()
                raise UserError(f"{self.name} did not start: {why}: fix that and run again; its log is {self.log}")
            time.sleep(0.5)

    def kill(self) -> None:
        """Kill the process and all its children."""
        self.holds_weights = False
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process.stdin.close()
        if self._private is not None:
            self._private.cleanup()

    def call(self, path: str, body: dict[str, Any] | None = None, timeout: float | None = None) -> Any:
        """POST ``body`` (GET if None) and return the response's JSON.

        Raises:
            ServerDown: no response within ``timeout`` seconds, or a status of 500 or more.
            RuntimeError: another error status.
        """
        connection = http.client.HTTPConnection(HOST, self._port, timeout=timeout)
        headers = {"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"}
        try:
            connection.request("GET" if body is None else "POST", path, body and json.dumps(body), headers)
            response = connection.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise ServerDown(f"{self.name}: {path}: {error!r}") from None
        finally:
            connection.close()
        if response.status >= 500:
            raise ServerDown(f"{self.name}: {path}: {response.status} {content[:500].decode(errors='replace')}")
        if response.status >= 400:
            raise RuntimeError(f"{self.name}: {path}: {content[:2000].decode(errors='replace')}; log: {self.log}")
        return json.loads(content) if "json" in response.headers.get("Content-Type", "") else None

    def capacity(self, timeout: float | None = None) -> int:
        """How many requests it runs at once."""
        return self.state(timeout)["effective_max_running_requests_per_dp"]

    def state(self, timeout: float | None = None) -> dict[str, Any]:
        """The scheduler's state; a hanging scheduler does not answer."""
        return self.call("/server_info", timeout=timeout)["internal_states"][0]

    def answer(self, request: Request, params: SamplingParams) -> Completion:
        """Sample one response; ``paused`` if it was aborted."""
        earlier = len(request.prefix_ids)
        sampling = {
            "max_new_tokens": params.max_new_tokens - earlier,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "presence_penalty": params.presence_penalty,
            "stop_token_ids": list(params.stop_token_ids),
            "ignore_eos": not params.stop_token_ids,  # true would make SGLang ignore stop_token_ids too
            "sampling_seed": request.seed % 2**31,  # used only under enable_deterministic_inference
        }
        ids = request.prompt_ids + request.prefix_ids
        body = {"input_ids": ids, "sampling_params": sampling, "return_logprob": True}
        if params.with_routing:
            body["return_routed_experts"] = True
        answer = self.call("/generate", body)
        self.has_answered = True
        information = answer["meta_info"]
        reason = information["finish_reason"]["type"]
        if reason == "abort":
            return _so_far(answer)
        tokens = answer["output_ids"]
        length = earlier + len(tokens)
        if reason == "length" and length < params.max_new_tokens:  # SGLang truncates what its memory can't hold
            raise UserError(
                f"{self.name}: its memory holds a response of {length} tokens, not of {params.max_new_tokens}:"
                " raise mem_fraction_static, or lower engine.max_running_requests"
            )
        scored = information["output_token_logprobs"][: len(tokens)]  # (log-prob, token, text) per token
        if [token for _, token, _ in scored] != tokens:
            raise RuntimeError(f"{self.name}: the log-probs of a response belong to other tokens than the response")
        return Completion(
            token_ids=tokens,
            log_probs=[log_prob for log_prob, _, _ in scored],
            finish=reason,
            drafting=_drafting(information),
            routing=_routing(information, len(ids) + len(tokens) - 1) if params.with_routing else None,
        )

    def abort(self, timeout: float) -> None:
        """Abort all requests."""
        self.call("/abort_request", {"rid": "", "abort_all": True}, timeout)

    def flush(self) -> None:
        """Clear the prefix cache, once no request is running."""
        self.call("/flush_cache?timeout=60", {}, timeout=120)

    def release(self, *kinds: str) -> None:
        """Release memory of these `KINDS_OF_MEMORY`; its content is lost."""
        if "weights" in kinds:
            self.holds_weights = False
        self.call("/release_memory_occupation", {"tags": list(kinds)}, timeout=600)

    def resume(self, *kinds: str) -> None:
        """Allocate memory of these `KINDS_OF_MEMORY` again; its content is undefined."""
        self.call("/resume_memory_occupation", {"tags": list(kinds)}, timeout=600)

    def _environment(self) -> dict[str, str]:
        """The environment of SGLang's processes, which meet in a private folder and listen only on loopback."""
        inherited = {name: value for name, value in os.environ.items() if not NOT_INHERITED.fullmatch(name)}
        return (
            inherited
            | loopback.INTERFACE
            | {
                "PYTHONPATH": os.pathsep.join(filter(None, [str(SCRIPTS), inherited.get("PYTHONPATH")])),
                "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",  # else every health check generates a token
                # Otherwise its processes use a TCPStore, which listens on every interface.
                "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE": f"file://{self._private.name}/group",
                "TMPDIR": self._private.name,  # for the sockets between its processes
            }
        )

    def _answers(self) -> bool:
        try:
            self.call("/health", timeout=60)
        except ServerDown:
            return False
        return True


def server_arguments(folder: Path, settings: Engine, index: int) -> dict[str, Any]:
    """SGLang's arguments for the ``index``-th server, by the names of its ``ServerArgs``, without unset ones."""
    speculation = settings.speculation
    arguments: dict[str, Any] = {
        "model_path": str(folder),
        "dtype": "bfloat16",  # like the training's weights, in whatever type the checkpoint is stored
        "host": HOST,
        "tp_size": settings.gpus_per_engine,
        "ep_size": settings.expert_parallel,
        "base_gpu_id": index * settings.gpus_per_engine,
        "mem_fraction_static": settings.mem_fraction_static,
        sglang_launch.CUDA_GRAPH_BATCH_SIZES[0]: settings.cuda_graph_batch_sizes,
        "max_running_requests": settings.max_running_requests,
        "enable_memory_saver": True,
        # The radix cache keeps up to five large linear-attention states per request: a fifth of the requests would run.
        "disable_radix_cache": True,
        # Capture takes half a minute per start, and prefill is a small part of long responses.
        "disable_prefill_cuda_graph": True,
        # SGLang's defaults use flashinfer, untested here. Without top-p and top-k it samples with torch anyway.
        "sampling_backend": "pytorch",
        "enforce_disable_flashinfer_allreduce_fusion": True,
        "skip_tokenizer_init": True,
        "enable_multimodal": False,
        "mm_attention_backend": "sdpa",  # for the vision tower, which never runs
        "grammar_backend": "none",
        "log_level_http": "warning",
    }
    if speculation:
        arguments |= {
            "speculative_algorithm": speculation.algorithm,
            "speculative_num_steps": speculation.steps,
            "speculative_eagle_topk": speculation.top_k,
            "speculative_num_draft_tokens": speculation.draft_tokens,
        }
    if settings.replay_routing:
        arguments["enable_return_routed_experts"] = True
    arguments |= settings.server_arguments
    if arguments.get("random_seed") is not None:
        arguments["random_seed"] += index  # or all servers would draw the same samples
    return {name: value for name, value in arguments.items() if value is not None}


def _so_far(answer: dict[str, Any]) -> Completion:
    """The tokens of an aborted response; there are none if it was aborted before it began."""
    information = answer["meta_info"]
    scored = information.get("output_token_logprobs") or []
    return Completion(
        token_ids=[token for _, token, _ in scored],
        log_probs=[log_prob for log_prob, _, _ in scored],
        finish="paused",
        drafting=_drafting(information),
    )


def _drafting(information: dict[str, Any]) -> Drafting | None:
    if "spec_verify_ct" not in information:
        return None
    return Drafting(
        passes=information["spec_verify_ct"],
        drafted=information["spec_num_proposed_drafts"],
        accepted=information["spec_num_correct_drafts"],
    )


def _routing(information: dict[str, Any], tokens: int) -> Tensor:
    """Decode SGLang's base64 of int32 to an int16 tensor (tokens, layers x k)."""
    experts = np.frombuffer(base64.b64decode(information["routed_experts"]), dtype=np.int32)
    return torch.from_numpy(experts.astype(np.int16)).view(tokens, -1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def _reason(log: Path) -> str:
    """The log line that best explains why the process ended: its last own error, else its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()[-400:] if line.strip()]
    errors = [line for line in lines if re.match(r"(\[[^]]*\] *)?[\w.]*(Error|Exception)\b|error: ", line)]
    own = [line for line in errors if not CONSEQUENCE.search(line)]
    return (own or errors or lines or ["it ended without output"])[-1][:400]
