"""TrainEngine on Megatron-core: tensor, pipeline, data and sequence parallelism.

`architectures` says which models and which ways to cut them there are, without importing megatron; `engine` has the
engine. Nothing outside this package imports megatron.
"""
