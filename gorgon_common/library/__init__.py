"""The parts of Gorgon that a Python program can use without running a workflow; exported by `gorgon`."""
