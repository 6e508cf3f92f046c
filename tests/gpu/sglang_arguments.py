"""What the tests' SGLang servers are told besides: to capture few graphs, and so fast."""

ARGUMENTS = {"cuda_graph_max_bs_decode": 16}
