package main

import (
	"fmt"
	"slices"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpoint "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
)

// detail is the part of a resource that changes in an experiment: a listener's destination ports, a cluster's endpoints, a split's weights.
func detail(resource *discovery.Resource) string {
	message, err := resource.Resource.UnmarshalNew()
	if err != nil {
		return " " + err.Error()
	}
	switch m := message.(type) {
	case *listener.Listener:
		return fmt.Sprintf(" chains=%d ports=%v", len(m.FilterChains), ports(m))
	case *endpoint.ClusterLoadAssignment:
		return fmt.Sprintf(" %v", endpoints(m))
	case *route.RouteConfiguration:
		return fmt.Sprintf(" weights=%v", weights(m))
	}
	return ""
}

func ports(l *listener.Listener) []int {
	var found []int
	for _, chain := range l.FilterChains {
		if port := chain.GetFilterChainMatch().GetDestinationPort(); port != nil && !slices.Contains(found, int(port.Value)) {
			found = append(found, int(port.Value))
		}
	}
	slices.Sort(found)
	return found
}

// endpoints: address:port, with the mode its peers use towards it.
func endpoints(assignment *endpoint.ClusterLoadAssignment) []string {
	found := []string{}
	for _, locality := range assignment.Endpoints {
		for _, one := range locality.LbEndpoints {
			address := one.GetEndpoint().GetAddress().GetSocketAddress()
			match := one.GetMetadata().GetFilterMetadata()["envoy.transport_socket_match"].GetFields()["tlsMode"]
			text := fmt.Sprintf("%s:%d tls=%s", address.GetAddress(), address.GetPortValue(), match.GetStringValue())
			if one.HealthStatus != core.HealthStatus_UNKNOWN {
				text += " " + one.HealthStatus.String()
			}
			found = append(found, text)
		}
	}
	return found
}

func weights(configuration *route.RouteConfiguration) []string {
	found := []string{}
	for _, host := range configuration.VirtualHosts {
		for _, one := range host.Routes {
			for _, cluster := range one.GetRoute().GetWeightedClusters().GetClusters() {
				found = append(found, fmt.Sprintf("%s=%d", cluster.Name, cluster.Weight.GetValue()))
			}
		}
	}
	return found
}
