"""Average several teachers, beside each of them alone and no teacher at all.

As it stands, two small GPT-2s learn from two halves of the text, and one student from both:

    python examples/multi_teacher.py --weights 0.5 0.5 --average probabilities
    python examples/multi_teacher.py --teachers-from my/first my/second --weights 0.7 0.3

Teachers need one vocabulary. Killed at any instant, the same command goes on.
"""
