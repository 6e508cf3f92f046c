"""SGLang's HTTP server as far as the pipeline uses it: a response repeats the prompt, its log-probs the process id."""

import array
import base64
import json
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

under_way = set()  # an event for each request, set to abort it
compiled = threading.Event()


def launch_server(arguments):
    if arguments.random_seed == 13:
        raise RuntimeError("CUDA out of memory, as it were")

    running = arguments.max_running_requests or 4
    cold, compiles = arguments.random_seed == 14, threading.Lock()  # the first answer needs kernels
    if not cold:
        compiled.set()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            with compiles:
                pass  # the scheduler is busy meanwhile
            self.reply({"internal_states": [{"effective_max_running_requests_per_dp": running}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.headers["Authorization"] == "Bearer " + arguments.api_key
            if self.path == "/abort_request":
                for event in list(under_way):
                    event.set()
            if self.path != "/generate":
                return self.reply(None)
            wanted, seed = body["sampling_params"], body["sampling_params"]["sampling_seed"]
            with compiles:
                if not compiled.is_set():
                    time.sleep(4)
                    compiled.set()
            tokens = [seed, *body["input_ids"]][: wanted["max_new_tokens"]]
            under_way.add(aborted := threading.Event())
            stopped = any(aborted.wait(0.02) for _ in body["input_ids"])
            under_way.remove(aborted)
            if stopped:
                tokens = tokens[: len(tokens) // 2]
            extra = {}
            if arguments.speculative_algorithm:
                extra |= {"spec_verify_ct": 5, "spec_num_proposed_drafts": 10, "spec_num_correct_drafts": 4}
            if body.get("return_routed_experts"):
                visited = range(3 * (len(body["input_ids"]) + len(tokens) - 1))
                extra["routed_experts"] = base64.b64encode(array.array("i", visited).tobytes()).decode()
            self.reply(
                {
                    "output_ids": tokens,
                    "meta_info": extra
                    | {
                        "finish_reason": {"type": "abort" if stopped else "length"},
                        "output_token_logprobs": [[-float(os.getpid()), token, None] for token in tokens],
                    },
                }
            )

        def reply(self, value):
            content = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    ThreadingHTTPServer.request_queue_size = 128
    ThreadingHTTPServer((arguments.host, arguments.port), Handler).serve_forever()
