"""What the teacher is shown: which ground truth, peer response or feedback a sample gets (``demonstration``), freed of
its reasoning (``thinking``), written into the prompt (``reprompt``), and turned into token ids that fit (``encode``).
Texts and ids only: nothing here imports torch or transformers.
"""
