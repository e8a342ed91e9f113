"""The states of the data as Dagster assets: captured → stored → enriched → modeled → released."""
