"""How steps travel: the Celery application, and plans as chains, groups and chords.  Names tasks, imports none."""
