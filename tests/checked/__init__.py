"""What is checked, and what came out: ``python -m tests.checked`` writes tests/README.md.

Every run leaves its result under build/checked: pytest its report, other programs a line by
:func:`tests.checked.results.record`. The page is made of these and of what tests/checked.json keeps
of earlier ones.
"""
