{{- define "llama-lora.validations" -}}
{{- end }}
