"""The arguments of SGLang's server that the pipeline passes."""

import dataclasses
from typing import Any


@dataclasses.dataclass
class ServerArgs:
    model_path: str
    dtype: str
    host: str
    port: int
    api_key: str
    tp_size: int
    ep_size: int
    base_gpu_id: int
    mem_fraction_static: float
    enable_memory_saver: bool
    disable_radix_cache: bool
    disable_prefill_cuda_graph: bool
    skip_tokenizer_init: bool
    enable_multimodal: bool
    mm_attention_backend: str
    grammar_backend: str
    sampling_backend: str
    log_level_http: str
    enforce_disable_flashinfer_allreduce_fusion: bool
    cuda_graph_bs: Any = None
    random_seed: Any = None
    enable_return_routed_experts: bool = False
    max_running_requests: Any = None
    speculative_algorithm: Any = None
    speculative_num_steps: Any = None
    speculative_eagle_topk: Any = None
    speculative_num_draft_tokens: Any = None
