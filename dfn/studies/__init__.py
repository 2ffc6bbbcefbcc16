"""Questions with an answer: language, recall, length, what each part is worth; memory and photographs."""
