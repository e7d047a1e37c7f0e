"""The core of Gorgon: the workflow language, the engine, and the adapters that the engine runs on."""
