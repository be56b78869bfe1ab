"""Searches for garbage, which free what a model's last job held on the device."""

import gc


def leave_out_what_lives() -> None:
    """Leave all objects that exist now out of each later search.

    Call this once, when the models are loaded. The imports of torch, transformers and diffusers
    make 470,000 objects, which live as long as the process. Every move of a model from its device
    makes a search, which takes 0.2 seconds if it looks at all of them. An object that is left out
    is freed as before when the last reference to it is gone; only a cycle of such objects stays. A
    model that is dropped keeps its modules and loses their weights, so it leaves no such cycle.
    """
    gc.collect()
    gc.freeze()
