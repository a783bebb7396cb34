"""The errors that a user can cause: one sentence with what, where, what was found and what to do.

The command line prints them without a traceback and exits with 2. Everything else is a fault of ours and
keeps its traceback.
"""


class EdmDistillError(Exception):
    """Base of every error that the user, not the program, can mend."""


class CheckpointError(EdmDistillError):
    """A checkpoint cannot be found, read, trusted or written."""


class RecipeError(EdmDistillError):
    """A recipe, or an override of it, says something that cannot be computed."""


class DatasetError(EdmDistillError):
    """A data set or a folder of images cannot be read, or does not fit the network."""


class TrainingError(EdmDistillError):
    """A run cannot start, go on or be resumed."""


class Elsewhere(TrainingError):
    """Another process of the run cannot go on, and says why: this one ends without a word."""


class HubError(EdmDistillError):
    """The Hugging Face Hub refused, or could not be reached."""
