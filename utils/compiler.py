"""Keeps torch from importing its compiler, which nothing here uses and which takes a second or two."""

from __future__ import annotations

import torch


def spare_the_compiler() -> None:
    """Makes torch's optimizers usable without it.

    torch excludes some of their methods from compilation, and imports the compiler to say so at the first call. That
    it has been told is kept in an attribute of the method; set here, it says that there is nothing to exclude from.
    """
    for name in ("add_param_group", "zero_grad", "load_state_dict", "state_dict"):
        method = getattr(getattr(torch.optim.Optimizer, name), "__wrapped__", None)
        if method is not None and not hasattr(method, "__dynamo_disable"):
            method.__dynamo_disable = method
