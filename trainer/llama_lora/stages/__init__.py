"""The stages, one module each: its ``STAGE`` says what it reads, its one public function does the work."""
