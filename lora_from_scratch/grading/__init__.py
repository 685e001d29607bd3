"""The instructor's side: notebooks are built from plain-text sources here, released and graded.

Nothing in the rest of the library imports this package. It needs the extra `course` (jupytext, nbclient, nbgrader).
"""
