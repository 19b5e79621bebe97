"""What is particular to one task: data, features, post-processing and metrics.

``table.py`` lists the tasks that share one path; ``question_answering`` has its own.
"""
