"""What a person reads: tables, plots and one page, made from the manifests of trainings and evaluations."""
