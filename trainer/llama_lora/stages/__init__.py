"""The stages, one per module: ``STAGE`` declares the stage, and one function does its work."""
