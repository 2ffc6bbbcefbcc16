"""Questions with an answer: recall, memory, what each part is worth, photographs."""
