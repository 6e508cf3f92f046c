"""Extra arguments of the tests' SGLang servers: capture few graphs, to start fast."""

ARGUMENTS = {"cuda_graph_max_bs_decode": 16}
