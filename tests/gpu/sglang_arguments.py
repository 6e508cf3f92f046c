"""What the tests' SGLang servers are told besides: few graphs, captured fast, and no kernel that is built first."""

ARGUMENTS = {"sampling_backend": "pytorch", "cuda_graph_max_bs_decode": 16}
