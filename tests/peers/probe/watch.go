package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"time"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	hcm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	// These register every message istiod puts into an Any, for the JSON form.
	_ "github.com/cncf/xds/go/udpa/type/v1"
	_ "github.com/cncf/xds/go/xds/type/v3"
	_ "istio.io/api/envoy/extensions/stats"
	_ "istio.io/istio/pkg/config/xds"
)

const (
	typeCluster  = "type.googleapis.com/envoy.config.cluster.v3.Cluster"
	typeEndpoint = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"
	typeListener = "type.googleapis.com/envoy.config.listener.v3.Listener"
	typeRoute    = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration"
)

var shortNames = map[string]string{typeCluster: "cds", typeEndpoint: "eds", typeListener: "lds", typeRoute: "rds"}

// pod is one stream: whose view, and with which token.
type pod struct {
	namespace, name, ip, account, token string
}

// pods collects --pod flags: NAMESPACE/NAME,IP,SERVICE_ACCOUNT[,TOKEN_FILE].
type pods []pod

func (p *pods) String() string { return fmt.Sprint(*p) }

func (p *pods) Set(text string) error {
	fields := strings.Split(text, ",")
	namespace, name, ok := strings.Cut(fields[0], "/")
	if !ok || len(fields) < 3 || len(fields) > 4 {
		return errors.New("want NAMESPACE/NAME,IP,SERVICE_ACCOUNT[,TOKEN_FILE]")
	}
	one := pod{namespace: namespace, name: name, ip: fields[1], account: fields[2]}
	if len(fields) == 4 {
		one.token = fields[3]
	}
	*p = append(*p, one)
	return nil
}

// options of `watch` that hold for all its streams.
type options struct {
	metadata map[string]any
	names    bool
	out      string
}

func watch(args []string) error {
	set := flag.NewFlagSet("watch", flag.ExitOnError)
	var c connection
	c.flags(set)
	var views pods
	set.Var(&views, "pod", "NAMESPACE/NAME,IP,SERVICE_ACCOUNT[,TOKEN_FILE]; repeatable, all over one connection")
	extra := map[string]any{}
	set.Func("meta", "KEY=VALUE put into the node's metadata (KEY.SUB=VALUE for a map); repeatable; an empty VALUE removes KEY", func(text string) error {
		return addMetadata(extra, text)
	})
	duration := set.Duration("for", 5*time.Second, "how long to watch")
	names := set.Bool("names", false, "print the resources' names")
	out := set.String("out", "", "folder for the first answer of each type, as .pb and .json")
	set.Parse(args)

	conn, err := c.dial()
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), *duration)
	defer cancel()
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt)
	defer stop()

	var group sync.WaitGroup
	failures := make([]error, len(views))
	for i, view := range views {
		group.Go(func() {
			err := view.follow(ctx, &c, conn, options{extra, *names, *out})
			if err != nil && ctx.Err() == nil {
				failures[i] = fmt.Errorf("%s/%s: %w", view.namespace, view.name, err)
			}
		})
	}
	group.Wait()
	return errors.Join(failures...)
}

func addMetadata(into map[string]any, text string) error {
	key, value, ok := strings.Cut(text, "=")
	if !ok {
		return errors.New("want KEY=VALUE")
	}
	if key, sub, nested := strings.Cut(key, "."); nested {
		inner, _ := into[key].(map[string]any)
		if inner == nil {
			inner = map[string]any{}
			into[key] = inner
		}
		inner[sub] = value
		return nil
	}
	into[key] = value
	return nil
}

// follow holds one delta ADS stream: wildcard clusters and listeners, then the endpoints and routes these name.
func (p pod) follow(ctx context.Context, c *connection, conn *grpc.ClientConn, o options) error {
	node, err := p.node(o.metadata)
	if err != nil {
		return err
	}
	ctx, err = c.withToken(ctx, p.token)
	if err != nil {
		return err
	}
	stream, err := discovery.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(ctx)
	if err != nil {
		return err
	}
	since := time.Now()
	for _, kind := range []string{typeCluster, typeListener} {
		if err := stream.Send(&discovery.DeltaDiscoveryRequest{Node: node, TypeUrl: kind}); err != nil {
			break // Recv tells why.
		}
	}
	asked := map[string]map[string]bool{typeEndpoint: {}, typeRoute: {}}
	seen := map[string]int{}
	for {
		answer, err := stream.Recv()
		if err == io.EOF {
			return errors.New("istiod closed the stream")
		}
		if err != nil {
			return err
		}
		seen[answer.TypeUrl]++
		p.print(answer, since, o.names)
		if o.out != "" && seen[answer.TypeUrl] == 1 {
			if err := p.record(o.out, answer); err != nil {
				return err
			}
		}
		if err := stream.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: answer.TypeUrl, ResponseNonce: answer.Nonce}); err != nil {
			continue
		}
		if err := subscribe(stream, answer, asked); err != nil {
			return err
		}
	}
}

func (p pod) node(extra map[string]any) (*core.Node, error) {
	metadata := map[string]any{
		"NAMESPACE":       p.namespace,
		"SERVICE_ACCOUNT": p.account,
		"INSTANCE_IPS":    p.ip,
		"CLUSTER_ID":      "Kubernetes",
		"ISTIO_VERSION":   "1.31.0",
	}
	for key, value := range extra {
		if value == "" {
			delete(metadata, key)
			continue
		}
		metadata[key] = value
	}
	fields, err := structpb.NewStruct(metadata)
	if err != nil {
		return nil, err
	}
	return &core.Node{
		Id:       fmt.Sprintf("sidecar~%s~%s.%s~%s.svc.cluster.local", p.ip, p.name, p.namespace, p.namespace),
		Metadata: fields,
	}, nil
}

// subscribe asks for what a cluster or listener answer refers to and was not asked for before.
func subscribe(stream grpc.BidiStreamingClient[discovery.DeltaDiscoveryRequest, discovery.DeltaDiscoveryResponse],
	answer *discovery.DeltaDiscoveryResponse, asked map[string]map[string]bool) error {
	var kind string
	var references func(*discovery.Resource) ([]string, error)
	switch answer.TypeUrl {
	case typeCluster:
		kind, references = typeEndpoint, endpointNames
	case typeListener:
		kind, references = typeRoute, routeNames
	default:
		return nil
	}
	var fresh []string
	for _, resource := range answer.Resources {
		found, err := references(resource)
		if err != nil {
			return fmt.Errorf("%s: %w", resource.Name, err)
		}
		for _, name := range found {
			if !asked[kind][name] {
				asked[kind][name] = true
				fresh = append(fresh, name)
			}
		}
	}
	if len(fresh) == 0 {
		return nil
	}
	return stream.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: kind, ResourceNamesSubscribe: fresh})
}

func endpointNames(resource *discovery.Resource) ([]string, error) {
	var c cluster.Cluster
	if err := resource.Resource.UnmarshalTo(&c); err != nil {
		return nil, err
	}
	if c.GetType() != cluster.Cluster_EDS {
		return nil, nil
	}
	if name := c.GetEdsClusterConfig().GetServiceName(); name != "" {
		return []string{name}, nil
	}
	return []string{c.Name}, nil
}

func routeNames(resource *discovery.Resource) ([]string, error) {
	var l listener.Listener
	if err := resource.Resource.UnmarshalTo(&l); err != nil {
		return nil, err
	}
	var names []string
	chains := l.FilterChains
	if l.DefaultFilterChain != nil {
		chains = append(chains, l.DefaultFilterChain)
	}
	for _, chain := range chains {
		for _, filter := range chain.Filters {
			var http hcm.HttpConnectionManager
			if filter.GetTypedConfig().MessageIs(&http) {
				if err := filter.GetTypedConfig().UnmarshalTo(&http); err != nil {
					return nil, err
				}
				if name := http.GetRds().GetRouteConfigName(); name != "" {
					names = append(names, name)
				}
			}
		}
	}
	return names, nil
}

// print: wall-clock time, milliseconds since the stream opened, whose, what, how many, how large.
func (p pod) print(answer *discovery.DeltaDiscoveryResponse, since time.Time, names bool) {
	fmt.Printf("%s %5d ms %s/%s %s resources=%d removed=%d bytes=%d\n", time.Now().Format("15:04:05.000"),
		time.Since(since).Milliseconds(), p.namespace, p.name, short(answer.TypeUrl), len(answer.Resources),
		len(answer.RemovedResources), proto.Size(answer))
	if !names {
		return
	}
	for _, resource := range answer.Resources {
		fmt.Println("    " + resource.Name + detail(resource))
	}
	for _, name := range answer.RemovedResources {
		fmt.Println("    removed " + name)
	}
}

// record writes FOLDER/POD.NAMESPACE/TYPE.pb and .json, the response as it came.
func (p pod) record(folder string, answer *discovery.DeltaDiscoveryResponse) error {
	into := filepath.Join(folder, p.name+"."+p.namespace)
	if err := os.MkdirAll(into, 0o755); err != nil {
		return err
	}
	binary, err := proto.MarshalOptions{Deterministic: true}.Marshal(answer)
	if err != nil {
		return err
	}
	text, err := protojson.MarshalOptions{Multiline: true, Indent: " "}.Marshal(answer)
	if err != nil {
		return err
	}
	path := filepath.Join(into, short(answer.TypeUrl))
	if err := os.WriteFile(path+".pb", binary, 0o644); err != nil {
		return err
	}
	return os.WriteFile(path+".json", text, 0o644)
}

func short(typeURL string) string {
	if name, ok := shortNames[typeURL]; ok {
		return name
	}
	return typeURL
}
