"""Do the checks notice when the library's own answer is changed in one place, and say what is wrong?

    python -m benchmarks.answer_mutants [UNIT | EXERCISE ...] [--list-survivors] [--list-vague] [--list-all]

Kill a survivor by a case in the unit's `exercises.py`, or explain it in `explained/unit_NN.toml` (see `explained`).
`--list-vague` has those that get a message of no use; a wrong answer in the bank gives them a better one.
"""
