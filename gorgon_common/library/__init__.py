"""What a Python program imports from Gorgon without running a workflow; `gorgon` exports it."""
