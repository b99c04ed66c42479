"""What a store holds on its way to receivers of OTLP: followed, mapped, sent, and what none would take."""
