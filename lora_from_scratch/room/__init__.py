"""The room view of a workshop: the teacher's page shows live which learner is at which exercise.

Read `protocol` first (what is sent), then `member` (the learner's side), `table` (what the teacher's computer knows)
and `server` with `page.html`. Nothing here knows the course: the exercises are passed in as names.
"""
