"""The image of the stages: built from the sources, pushed to a registry, and its digest written where it is used."""
