"""stub"""
HIDDEN_STATES = 1 << 30
LOGITS = 512 << 20
