// Renders Ollama templates with Go's own text/template, for tests: cases as JSON on stdin, results as JSON on stdout.
//
// What Ollama does around text/template is written anew from its behaviour (template/template.go, v0.32): which variables a
// template sees, how messages are put together, and how templates from before .Messages are run round by round.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"strings"
	"text/template"
	"text/template/parse"
)

type message struct {
	Role    string `json:"role"`
	Content string `json:"content"`
}

type question struct {
	Template  string    `json:"template"`
	Messages  []message `json:"messages"`
	Printable []rune    `json:"printable"` // code points: which of them a Modelfile keeps
}

type answer struct {
	Text      string `json:"text"`
	Error     string `json:"error"`
	Printable []bool `json:"printable"`
}

func main() {
	var questions []question
	if err := json.NewDecoder(os.Stdin).Decode(&questions); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	answers := make([]answer, len(questions))
	for i, q := range questions {
		for _, r := range q.Printable {
			answers[i].Printable = append(answers[i].Printable, strconv.IsPrint(r))
		}
		if q.Template == "" {
			continue
		}
		text, err := render(q.Template, q.Messages)
		answers[i].Text = text
		if err != nil {
			answers[i].Error = err.Error()
		}
	}
	if err := json.NewEncoder(os.Stdout).Encode(answers); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func render(text string, messages []message) (string, error) {
	t, err := template.New("").Option("missingkey=zero").Funcs(template.FuncMap{"json": toJSON}).Parse(text)
	if err != nil {
		return "", err
	}
	named := fields(t.Tree.Root)
	if !named["Messages"] && !named["Response"] {
		t.Tree.Root.Nodes = append(t.Tree.Root.Nodes, response())
	}
	system, joined := together(messages)
	if !named["Messages"] {
		return byRounds(t, joined)
	}
	var out strings.Builder
	err = t.Execute(&out, map[string]any{"System": system, "Messages": joined, "Response": ""})
	return out.String(), err
}

func toJSON(v any) string {
	raw, _ := json.Marshal(v)
	return string(raw)
}

// together joins the texts of messages of one role that follow each other, and those of all system messages.
func together(messages []message) (string, []message) {
	var system []string
	var joined []message
	for _, m := range messages {
		if m.Role == "system" {
			system = append(system, m.Content)
		}
		if n := len(joined); n > 0 && joined[n-1].Role == m.Role && m.Role != "tool" {
			joined[n-1].Content += "\n\n" + m.Content
		} else {
			joined = append(joined, m)
		}
	}
	return strings.Join(system, "\n\n"), joined
}

// byRounds runs a template that knows one round (.System, .Prompt, .Response) for each of them; the last ends where its
// answer would stand.
func byRounds(t *template.Template, messages []message) (string, error) {
	var out strings.Builder
	round := map[string]any{"System": "", "Prompt": "", "Response": ""}
	finish := func(t *template.Template) error {
		err := t.Execute(&out, round)
		round = map[string]any{"System": "", "Prompt": "", "Response": ""}
		return err
	}
	for _, m := range messages {
		full := m.Role == "system" && (round["Prompt"] != "" || round["Response"] != "") ||
			m.Role == "user" && round["Response"] != ""
		if full {
			if err := finish(t); err != nil {
				return "", err
			}
		}
		if name := map[string]string{"system": "System", "user": "Prompt", "assistant": "Response"}[m.Role]; name != "" {
			round[name] = m.Content
		}
	}
	open, err := t.Clone()
	if err != nil {
		return "", err
	}
	open.Tree = t.Tree.Copy()
	cut := false
	open.Tree.Root = upToResponse(open.Tree.Root, &cut)
	if err := finish(open); err != nil {
		return "", err
	}
	return out.String(), nil
}

// upToResponse drops what comes behind the first action that names .Response.
func upToResponse(list *parse.ListNode, cut *bool) *parse.ListNode {
	if list == nil {
		return nil
	}
	var kept []parse.Node
	for _, n := range list.Nodes {
		if *cut {
			break
		}
		kept = append(kept, n)
		switch n := n.(type) {
		case *parse.IfNode:
			n.List, n.ElseList = upToResponse(n.List, cut), upToResponse(n.ElseList, cut)
		case *parse.RangeNode:
			n.List, n.ElseList = upToResponse(n.List, cut), upToResponse(n.ElseList, cut)
		case *parse.WithNode:
			n.List, n.ElseList = upToResponse(n.List, cut), upToResponse(n.ElseList, cut)
		case *parse.ActionNode:
			*cut = fields(n)["Response"]
		}
	}
	list.Nodes = kept
	return list
}

// response is the node of {{ .Response }}.
func response() parse.Node {
	return template.Must(template.New("").Parse("{{ .Response }}")).Tree.Root.Nodes[0]
}

// fields are the names of all fields that a template's node mentions.
func fields(node parse.Node) map[string]bool {
	found := map[string]bool{}
	var walk func(parse.Node)
	list := func(l *parse.ListNode) {
		if l != nil {
			for _, n := range l.Nodes {
				walk(n)
			}
		}
	}
	branch := func(b *parse.BranchNode) {
		walk(b.Pipe)
		list(b.List)
		list(b.ElseList)
	}
	walk = func(n parse.Node) {
		switch n := n.(type) {
		case *parse.ListNode:
			list(n)
		case *parse.IfNode:
			branch(&n.BranchNode)
		case *parse.RangeNode:
			branch(&n.BranchNode)
		case *parse.WithNode:
			branch(&n.BranchNode)
		case *parse.ActionNode:
			walk(n.Pipe)
		case *parse.PipeNode:
			for _, c := range n.Cmds {
				for _, a := range c.Args {
					walk(a)
				}
			}
		case *parse.FieldNode:
			for _, name := range n.Ident {
				found[name] = true
			}
		case *parse.VariableNode:
			for _, name := range n.Ident {
				found[name] = true
			}
		}
	}
	walk(node)
	return found
}
