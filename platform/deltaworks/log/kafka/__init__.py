"""The change log on Apache Kafka; `place.KafkaLog` is what the registry knows of it."""
