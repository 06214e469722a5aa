"""Makes the golden references: tiny models, their adapters, and what transformers, PEFT and TRL say about them."""
