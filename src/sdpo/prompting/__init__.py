"""Build the teacher's prompts.

``demonstrations`` selects a ground truth, a successful rollout or feedback, ``reasoning`` removes its reasoning,
``templates`` inserts it into the prompt, and ``tokenization`` encodes and truncates the prompt. ``teacher_context``
does all this for the rollouts of a step. The package handles texts and token ids, without torch or transformers.
"""
