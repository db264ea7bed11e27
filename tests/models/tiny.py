"""The sizes of a tiny checkpoint, as its config.json gives them."""

TINY = dict(
    model_type="llama",
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
EXPERTS = dict(model_type="gpt_oss", num_local_experts=2, num_experts_per_tok=1, sliding_window=None)
