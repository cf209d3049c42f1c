"""``make gpu-check``: everything that only a GPU can tell, within ten minutes, whatever happens.

``steps.py`` says what is run and for how long. Each program runs in a process of its own
(``runner.py``) and works through named rows (``worker.py``), whose results it appends to one file
at once (``journal.py``), from which ``page.py`` makes the report. A row that hangs, crashes or
breaks the device costs itself: the program goes on behind it in a new process.
"""
