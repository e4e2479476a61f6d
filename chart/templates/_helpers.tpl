{{- /* Labels of all objects. Arguments: root, component. */}}
{{- define "llama-lora.labels" -}}
{{- $root := .root -}}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" }}
app.kubernetes.io/name: {{ include "llama-lora.name" $root | quote }}
app.kubernetes.io/instance: {{ $root.Release.Name | quote }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
app.kubernetes.io/part-of: llama-lora
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- /* Labels of a stage's objects and pods: those above and the run. Arguments: root, stage. */}}
{{- define "stage.labels" -}}
{{ include "llama-lora.labels" (dict "root" .root "component" .stage) }}
llama-lora/run: {{ include "llama-lora.run.label" .root | quote }}
{{- end }}

{{- define "llama-lora.image" -}}
{{- $image := .Values.image }}
{{- if $image.digest }}
{{- $image.repository }}@{{ $image.digest }}
{{- else }}
{{- $image.repository }}:{{ $image.tag | default .Chart.AppVersion }}
{{- end }}
{{- end }}

{{- /* "true" if the stages are hooks of this release, "" if a runner installs them. */}}
{{- define "llama-lora.attached" -}}
{{- if eq .Values.pipeline.mode "attached" }}true{{ end }}
{{- end }}

{{- /* "true" if there is something to publish. */}}
{{- define "llama-lora.publishes" -}}
{{- $publish := .Values.publish }}
{{- if or $publish.s3.uri $publish.hub.adapter $publish.hub.merged }}true{{ end }}
{{- end }}

{{- /* The Secret with the token that reads from the Hub, as {name, key}; the name is empty without one. */}}
{{- define "llama-lora.token" -}}
{{- dict "name" .Values.huggingFace.tokenSecret "key" .Values.huggingFace.tokenKey | toYaml }}
{{- end }}

{{- /* The Secret with the token of the stage publish, as {name, key}; the name is empty without a repository to write to. */}}
{{- define "llama-lora.publish.token" -}}
{{- $hub := .Values.publish.hub }}
{{- if not (or $hub.adapter $hub.merged) }}
{{- dict "name" "" "key" "" | toYaml }}
{{- else if $hub.tokenSecret }}
{{- dict "name" $hub.tokenSecret "key" $hub.tokenKey | toYaml }}
{{- else }}
{{- include "llama-lora.token" . }}
{{- end }}
{{- end }}

{{- /* The Secrets of the release besides huggingFace.tokenSecret, as {name, key}; no key: any may be there. */}}
{{- define "llama-lora.secrets" -}}
{{- $secrets := list (include "llama-lora.publish.token" . | fromYaml) (dict "name" .Values.monitoring.secretName "key" "") }}
{{- $first := include "llama-lora.token" . | fromYaml }}
{{- $others := list }}
{{- range $secret := $secrets }}
{{- if and $secret.name (ne (toJson $secret) (toJson $first)) }}
{{- $others = append $others $secret }}
{{- end }}
{{- end }}
{{- $others | toJson }}
{{- end }}
