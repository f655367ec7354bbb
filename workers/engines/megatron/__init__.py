"""TrainEngine on Megatron-core: tensor, pipeline, data and sequence parallelism.

`architectures` says which models and which ways to cut them there are, without importing megatron; `engine` has the
engine. Nothing outside this package imports megatron.
"""

import warnings

# at every import: Transformer Engine and Apex, which nothing here uses, are not installed
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
