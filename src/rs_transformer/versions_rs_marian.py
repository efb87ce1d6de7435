# Copyright 2026 The rs-transformer authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What differs between releases of transformers, all of it here: the names of arguments, and who may give which.

Self-contained: this file travels to the Hub beside the weights, as remote code.
"""

import inspect
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.utils import TransformersKwargs, is_torchdynamo_compiling

# The oldest and the newest release that were tested.
TESTED_TRANSFORMERS = ("5.18.0", "5.24.0")

# 5.24 renamed `past_key_values` to `cache`, in arguments and in outputs; the old name goes in 5.40.
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"

# What transformers hands through every `forward`, down to the attention; what its decorators take out on the way; and
# what `generate` gives to a `forward` or an encoder beside that.
HANDED_THROUGH = TransformersKwargs.__optional_keys__
OF_DECORATORS = {"return_dict", "use_cache", "output_cross_attentions", "debug_io", "debug_io_dir", "prune_layers"}
OF_GENERATE = {"labels", "tokenizer", "assistant_tokenizer"}


def takes_old_name(function: Callable, until: str = "5.40.0") -> Callable:
    """Have a function with an argument `cache` take `past_key_values` too, deprecated, where transformers does.

    As transformers' `deprecate_kwarg`, which would drop one of two different caches.

    Raises:
        ValueError: when called with one cache by the one name and another by the other.
    """
    if CACHE == "past_key_values":
        return function

    @wraps(function)
    def renamed(*args, **kwargs):
        if "past_key_values" in kwargs:
            old, new = kwargs.pop("past_key_values"), kwargs.get(CACHE)
            if old is not None and new is not None and old is not new:
                raise ValueError(
                    "past_key_values and cache are two names of one argument, and were given two caches: give one "
                    "(PEFT's prefix tuning gives both in `generate` from transformers 5.24 on)"
                )
            if not is_torchdynamo_compiling():
                warnings.warn(
                    f"`past_key_values` is deprecated and will be removed in version {until} for "
                    f"`{type(args[0]).__name__}.{function.__name__}`. Use `cache` instead.",
                    FutureWarning,
                    stacklevel=2,
                )
            kwargs[CACHE] = old if new is None else new
        return function(*args, **kwargs)

    return renamed


def strict_forward(forward: Callable) -> Callable:
    """Give a `forward` that is written with `cache` the names of this transformers, and refuse unknown arguments.

    Raises:
        TypeError: when called with an argument that neither the `forward` nor transformers knows; None is none given,
            as for `generate`. `**kwargs` alone would swallow a renamed `cache`, and each step would then be decoded
            as if it were the first.
    """
    signature = inspect.signature(forward)
    parameters = [p.replace(name=CACHE) if p.name == "cache" else p for p in signature.parameters.values()]
    known = HANDED_THROUGH | OF_DECORATORS | OF_GENERATE | {p.name for p in parameters}

    @wraps(forward)
    def checked(self, *args, **kwargs):
        for name, value in kwargs.items():
            if name not in known and value is not None:
                raise TypeError(f"{type(self).__name__}.forward() got an unexpected keyword argument {name!r}")
        if CACHE in kwargs:
            kwargs["cache"] = kwargs.pop(CACHE)
        return forward(self, *args, **kwargs)

    checked.__signature__ = signature.replace(parameters=parameters)
    return takes_old_name(checked) if CACHE in known else checked


def handed_through(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Of a stack's arguments those that its layers know: transformers' decorators add others, such as `use_cache`."""
    return {name: value for name, value in kwargs.items() if name in HANDED_THROUGH}


def update_cache(
    cache: Cache, key_states: torch.Tensor, value_states: torch.Tensor, step: int, kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`Cache.update`, which is told of the attention's other arguments from 5.24 on."""
    more = {"kwargs": kwargs} if CACHE == "cache" else {}
    return cache.update(key_states, value_states, step, **more)
