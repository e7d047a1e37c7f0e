"""The core of Gorgon: the workflow language, the engine and the adapters they run on."""
