"""What a person looks at: training curves, entities that drift, fields, runs, studies."""
