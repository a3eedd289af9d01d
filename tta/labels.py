"""The label of unknown classes, shared by the datasets that give it and the results that leave it out."""

UNKNOWN = -1  # a class that the source model does not know; its samples do not count in the errors
