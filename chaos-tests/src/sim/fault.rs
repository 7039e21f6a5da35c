//! What goes wrong, and how it is put right.

use warren_scheduler::state::command::Body;

use super::agent::SLOW_PAUSE;
use super::clock::{MS, SECOND, micros};
use super::queue::Event;
use super::world::World;

/// One kind of fault.
type Fault = fn(&mut World);

impl World {
    /// One fault, and the time of the next.
    pub fn fault(&mut self) {
        if self.calm {
            return;
        }
        let at = self.now + self.rng.between(1, self.plan.fault_pause);
        self.queue.put(at, Event::Fault);
        let w = self.plan.weights.clone();
        let kinds: [(u64, Fault); 9] = [
            (w.replica_crash, Self::fault_replica_crash),
            (w.cut, Self::fault_cut),
            (w.transfer, Self::fault_transfer),
            (w.agent_crash, Self::fault_agent_crash),
            (w.stall, Self::fault_stall),
            (w.reboot, Self::fault_reboot),
            (w.session_break, Self::fault_session_break),
            (w.clock_jump, Self::fault_clock_jump),
            (w.shrink, Self::fault_shrink),
        ];
        let total: u64 = kinds.iter().map(|(weight, _)| weight).sum();
        let mut at = self.rng.below(total.max(1));
        for (weight, fault) in kinds {
            if at < weight {
                return fault(self);
            }
            at -= weight;
        }
    }

    fn some_replica(&mut self) -> usize {
        match self.log.leader {
            Some(leader) if self.rng.per_mille(500) => leader,
            _ => self.rng.index(self.replicas.len()),
        }
    }

    fn some_agent(&mut self) -> usize {
        self.rng.index(self.agents.len())
    }

    /// Around a lease: what is shorter or longer than one matters most.
    fn about_a_lease(&mut self) -> u64 {
        let lease = micros(self.lease);
        // From the last renewal to the verdict that a node is down.
        let down = lease * 201 / 100 + SECOND;
        match self.rng.below(10) {
            0..5 => self.rng.between(lease / 20, lease * 3),
            5..8 => self.rng.between(down - lease / 3, down + SECOND / 2),
            _ => self.rng.between(down, down * 3),
        }
    }

    fn fault_replica_crash(&mut self) {
        let replica = self.some_replica();
        if !self.replicas[replica].up {
            return;
        }
        self.crash_replica(replica);
        let at = self.now + self.rng.between(200 * MS, 15 * SECOND);
        self.queue.put(at, Event::ReplicaStarts { replica });
    }

    fn fault_cut(&mut self) {
        let replica = self.some_replica();
        if self.replicas[replica].cut {
            return;
        }
        self.trace.note(self.now, format_args!("replica {replica} is cut off"));
        self.replicas[replica].cut = true;
        if self.log.leader == Some(replica) {
            self.schedule_election();
        }
        let long = self.about_a_lease().max(500 * MS);
        let at = self.now + self.rng.between(50 * MS, long);
        self.queue.put(at, Event::Heals { replica });
    }

    pub fn heals(&mut self, replica: usize) {
        if !std::mem::replace(&mut self.replicas[replica].cut, false) {
            return;
        }
        self.trace.note(self.now, format_args!("replica {replica} is reached again"));
        self.schedule_catch_up(replica);
        let current = self.log.term;
        let Some(lead) = &self.replicas[replica].lead else {
            self.replicas[replica].known_leader = self.log.leader;
            if self.log.leader.is_none_or(|leader| !self.really_leads(leader, current)) {
                self.schedule_election();
            }
            return self.send_again();
        };
        if lead.term < current {
            let at = self.now + self.latency();
            return self.queue.put(at, Event::StepDown { replica, term: current });
        }
        self.schedule_election();
        self.send_again();
    }

    fn fault_transfer(&mut self) {
        let term = self.log.term;
        let Some(leader) = self.log.leader.filter(|leader| self.really_leads(*leader, term)) else { return };
        let able: Vec<usize> = (0..self.replicas.len())
            .filter(|i| *i != leader && self.replicas[*i].up && !self.replicas[*i].cut)
            .collect();
        if let Some(next) = self.rng.pick(&able).copied() {
            self.take_over(next);
        }
    }

    fn fault_agent_crash(&mut self) {
        let agent = self.some_agent();
        if self.agents[agent].process.is_none() {
            return;
        }
        self.stop_agent(agent);
        self.restart_agent(agent);
    }

    fn restart_agent(&mut self, agent: usize) {
        let longest = self.about_a_lease().max(20 * MS);
        let at = self.now + self.rng.between(10 * MS, longest);
        let life = self.agents[agent].life;
        self.queue.put(at, Event::AgentStarts { agent, life });
    }

    fn fault_stall(&mut self) {
        let agent = self.some_agent();
        let host = &mut self.agents[agent];
        if host.process.is_none() || host.stalled.is_some() {
            return;
        }
        self.trace.note(self.now, format_args!("{} is stopped", host.id));
        host.stalled = Some(Default::default());
        let at = match self.verdict_due(agent).filter(|_| self.rng.per_mille(300)) {
            // Its first pause and a round trip before: what it says next meets the verdict on its way into the log.
            Some(due) => due.saturating_sub(self.rng.between(20 * MS, 250 * MS)).max(self.now),
            None => self.now + self.about_a_lease(),
        };
        self.queue.put(at, Event::AgentWakes { agent });
    }

    /// When the leader will say that the agent's node is down, if it hears nothing more.
    fn verdict_due(&self, agent: usize) -> Option<u64> {
        let leader = &self.replicas[self.log.leader?];
        let id = leader.lead.as_ref()?.sessions.get(&self.agents[agent].id)?;
        let silent_since = self.sessions.get(id)?.received;
        Some(leader.clock.when(silent_since + self.lease + self.grace()))
    }

    fn fault_reboot(&mut self) {
        let agent = self.some_agent();
        self.reboot(agent);
        self.restart_agent(agent);
    }

    /// A stream breaks; neither end knows it at once.
    fn fault_session_break(&mut self) {
        let agent = self.some_agent();
        let link = self.agents[agent].process.as_ref().and_then(|process| process.link.as_ref());
        let Some(id) = link.map(|link| link.id) else { return };
        if let Some(session) = self.sessions.get_mut(&id) {
            session.broken = true;
        }
        self.trace.note(self.now, format_args!("session {id} breaks"));
        if self.rng.per_mille(600) {
            let at = self.now + self.rng.between(MS, 20 * SECOND);
            self.queue.put(at, Event::ReplicaLearns { session: id });
        }
    }

    /// One replica's wall clock at a time is wrong: a majority is right.
    fn fault_clock_jump(&mut self) {
        if self.wrong_clock.is_some() {
            return;
        }
        let replica = self.some_replica();
        let by = i64::try_from(self.rng.between(1, 1 << 20) << self.rng.below(14)).unwrap_or(1);
        let by = if self.rng.per_mille(500) { by } else { -by };
        self.trace.note(self.now, format_args!("replica {replica}'s clock jumps by {by} ms"));
        self.replicas[replica].clock.jump(by);
        self.wrong_clock = Some(replica);
        let at = self.now + self.rng.between(SECOND, 120 * SECOND);
        self.queue.put(at, Event::ClockSettles { replica });
    }

    pub fn clock_settles(&mut self, replica: usize) {
        self.replicas[replica].clock.settle(0);
        self.wrong_clock = None;
    }

    /// A host comes back with less than it had.
    fn fault_shrink(&mut self) {
        let agent = self.some_agent();
        let capacity = &mut self.agents[agent].capacity;
        capacity.cpu.0 -= capacity.cpu.0 / 4;
        self.stop_agent(agent);
        self.restart_agent(agent);
    }

    /// Everything is put right, and stays so.
    pub fn calm_down(&mut self) {
        self.trace.note(self.now, format_args!("calm"));
        self.calm = true;
        for replica in 0..self.replicas.len() {
            self.start_replica(replica);
            self.heals(replica);
            self.clock_settles(replica);
        }
        for agent in 0..self.agents.len() {
            self.wake_agent(agent);
            self.start_agent(agent);
        }
    }

    /// Puts everything right, waits until it must have had its effect, and lets the oracle look at what has become of it all.
    pub fn settle_down(&mut self) {
        if self.oracle.violation.is_some() {
            return;
        }
        self.calm_down();
        // The slowest agent comes back after its longest pause and two leases; a start that a freeze caught takes a minute to
        // be given up, and others may be made only then.
        let long = 2 * SLOW_PAUSE + 5 * micros(self.lease) + 80 * SECOND;
        let end = self.now + long;
        self.queue.put(self.now + 2 * SECOND, Event::CalmOperator);
        while self.oracle.violation.is_none() && self.now < end && self.step() {}
        // Whatever was just begun comes to its end before anybody judges.
        let quiet = |world: &Self| world.now >= world.last_commit + 3 * SECOND;
        let last = end + 120 * SECOND;
        while self.oracle.violation.is_none() && self.now < last && !quiet(self) && self.step() {}
        self.oracle.came_to_rest(quiet(self));
        if self.oracle.violation.is_none() {
            self.oracle.all_is_calm(&self.agents);
        }
    }

    /// Operators say again what they said before anybody led.
    pub fn calm_operator(&mut self) {
        let pauses = Body::SetPause { creates: Some(false), placement: Some(false), moves: Some(false) };
        for body in [Body::ReleaseBrake, pauses] {
            self.operate(body);
        }
        self.queue.put(self.now + 5 * SECOND, Event::CalmOperator);
    }
}
