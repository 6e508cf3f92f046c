"""Tables, plots and the report page, made from the manifests of trainings and evaluations."""
