"""Run by `test_accelerate_configs.py` in two processes: `training/train.py` sharded by accelerate's FSDP2, on the CPU.

accelerate takes GPUs alone for FSDP; here it is told that the processes have some. All else is as it is there.
"""

import runpy
import sys

from accelerate import PartialState
from accelerate.utils import DistributedType

make = PartialState.__init__


def make_with_gpus(self, *args, **kwargs):
    make(self, *args, **kwargs)
    if PartialState._shared_state["distributed_type"] == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


PartialState.__init__ = make_with_gpus
sys.argv = ["training/train.py", *sys.argv[1:]]
runpy.run_path(sys.argv[0], run_name="__main__")
