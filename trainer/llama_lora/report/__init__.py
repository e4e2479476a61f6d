"""The run's report.html: one self-contained file without scripts, for light and dark screens and for phones.

``facts`` reads what the page shows, ``page`` renders it, ``charts``, ``differences`` and ``html`` render its parts.
"""
