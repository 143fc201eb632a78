"""From a configuration to a result.

running: one command from its settings to its task. building: objects from settings. fits: whether parts fit together.
runs: folders, and which checkpoint a run resumes from. weights: a checkpoint into a ready model. fitting: one training.
from_checkpoint: settings taken from a published model. library, classifier: the same for a notebook.
"""
