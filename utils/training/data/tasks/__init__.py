"""Training tasks, one file each: `draw` makes an example from what `TaskSources` has, or None where that does not suit.

`registry.py` names them all.
"""
